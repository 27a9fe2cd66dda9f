"""The rules that keep or drop a document by its text or its address, each a `Step` made from its part of the recipe."""
