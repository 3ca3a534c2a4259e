"""What a run did, as one HTML page and its pictures."""
