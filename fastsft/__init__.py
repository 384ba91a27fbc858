"""fastsft keeps the books of a fine-tuning run, and balances them."""
