"""Commands about this installation of the program: doctor, completion, extension."""
