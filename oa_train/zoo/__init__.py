"""How the models that come with the package, or are written by it, are made, and what is known of their circuits."""
