"""Many runs over a grid of settings and seeds, and one table of what came out."""
