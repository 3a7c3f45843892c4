"""What is built on top of the five files; nothing imports it."""
