"""Parts of the Granular Alignment Paradigm (GAP) beside its training: visual PCA, latent heads, norms, difficulty."""
