"""The vocabulary that the trainer and the anchors share. Imports neither of them, and no Ray."""
