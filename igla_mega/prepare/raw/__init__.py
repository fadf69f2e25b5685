"""Find and open the files of raw text."""
