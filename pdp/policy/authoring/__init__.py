"""What policy authors do with a bundle: begin, check, test, build, sign and verify one."""
