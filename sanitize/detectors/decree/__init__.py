"""DECREE (Feng et al., CVPR 2023) judges encoders, not samples: settings, inversion of the smallest trigger, verdict."""
