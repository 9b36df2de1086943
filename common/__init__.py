"""What no paper is about: device, command line, data, runs, drawing, quality."""
