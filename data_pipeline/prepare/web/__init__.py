"""Links to pages, and the polite fetcher that archives them."""
