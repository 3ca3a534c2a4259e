"""The service: images and questions in, answers, scores and latents out, over HTTP on Ray Serve."""
