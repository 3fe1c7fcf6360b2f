"""`deem demo`: the plugin in small, on scenes about which everything is known."""
