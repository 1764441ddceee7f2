"""What stands in for an ablated component: zeros, means, learned constants."""
