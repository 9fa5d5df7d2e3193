"""A checkpoint folder in, a file or folder for another engine out."""
