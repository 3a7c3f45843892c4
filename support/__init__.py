"""What any training program needs, and no idea of the paper."""
