"""Red team: triggers and attacks on encoders. Never imported by fit, scan or clean."""
