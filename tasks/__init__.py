"""What is learned, and how answers are judged; no idea of models."""
