"""transformers caches that compute attention over our stores."""
