"""The nginx language, pure: text in, values with file and line out. Files come through an injected reader."""
