"""What is particular to speech, images and text."""
