"""Measurements against other people's software. They print tables; they never pass or fail on time."""
