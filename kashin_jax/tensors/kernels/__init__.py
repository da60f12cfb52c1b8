"""Ways to multiply by packed matrices."""
