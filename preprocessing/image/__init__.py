"""Images to rows of image shards."""
