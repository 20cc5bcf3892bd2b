"""Split virtqueues: configuration, the ring walker in C, and its workers."""
