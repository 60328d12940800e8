"""What turns images, video frames and sound into soft tokens."""
