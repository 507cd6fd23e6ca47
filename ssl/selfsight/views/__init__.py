"""Views of an image: where crops lie (`place`, in workers) and how they look (`photo`, in batches on the device)."""
