"""Raw images: the array cache, the downloads that fill it, and image files of one's own."""
