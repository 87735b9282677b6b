"""What happens around every forward of an adapted model, one pass a file."""
