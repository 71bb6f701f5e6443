"""Whole experiments. They import sanitize; nothing imports them."""
