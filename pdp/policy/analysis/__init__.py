"""What a bundle lets whom do, and what a change of it would change."""
