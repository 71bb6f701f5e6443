"""One module per arrow of the flow; each turns one record into the next."""
