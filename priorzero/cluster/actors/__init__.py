"""The classes that Ray runs as actors, each in a process of its own."""
