"""What launch.doctor looks at; each function returns what it found."""
