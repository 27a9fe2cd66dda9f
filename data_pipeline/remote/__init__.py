"""Sources that are not local folders: where bytes come from, and the node's cache that they pass through."""
