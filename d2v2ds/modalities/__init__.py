"""Everything that belongs to one kind of input: speech, images, text. Nothing outside compares their names."""
