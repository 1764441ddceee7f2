"""Models that come with the package or are made by it: how each is made, and what is known of it."""
