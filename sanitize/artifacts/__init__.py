"""What is on disk, typed: the only modules that write and read detector, scan, encoder and truth files."""
