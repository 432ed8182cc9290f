"""What features cost: their assembly, rows of host tables, stores that fail, and answers that do not wait for them."""
