"""Parts of pyspec in other programs, one module each, which imports that program: nothing here is imported unasked."""
