"""What the tests share. A test imports from here, never from another test file."""
