"""What is measured, and how: exactness, attention and collectives, and the records of it."""
