"""Raw images: the array cache, and the downloads that fill it."""
