"""What the `tensorferry` command can do, one module a command. Nothing here is imported by `import tensorferry`."""
