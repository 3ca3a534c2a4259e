"""The toy world: small procedural scenes, questions about them, and tiny VLMs that can see them."""
