std = "ngx_lua"
max_line_length = 120
files["tests/lua/spec"].std = "max+busted"
