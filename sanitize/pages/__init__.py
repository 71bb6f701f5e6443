"""HTML pages: one file each, that loads nothing from elsewhere and runs no text of a data set as markup."""
