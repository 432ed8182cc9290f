"""What features cost: assembly, the cache's library, and stores under faults."""
