"""The learning side: generator, bridge to the anchors, losses, loop, data, evaluation, command line."""
