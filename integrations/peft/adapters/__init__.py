"""What is done to whole adapter directories: made, checked, compared, combined, made smaller."""
