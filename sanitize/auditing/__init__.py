"""Parts of `sanitize audit`: what a scan decided, what its samples look like, and the report of both."""
