"""What may edit a session's cache: one module a method, and the stack of those that act together."""
