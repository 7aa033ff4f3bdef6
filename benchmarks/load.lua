-- For wrk: each thread sends one body over and over, and every answer is compared with the one that is known.
-- $REQUESTS names a file with a line for each: body file, content type, key, then label and probability by turns, all
-- separated by tabs; of each picture in the body its best label, in order.

local lines, threads = {}, {}
for line in io.lines(os.getenv("REQUESTS")) do lines[#lines + 1] = line end

function setup(thread)
  thread:set("line", lines[#threads % #lines + 1])
  threads[#threads + 1] = thread
end

function init()
  local words = {}
  for word in line:gmatch("[^\t]+") do words[#words + 1] = word end
  local file = assert(io.open(words[1], "rb"))
  wrk.method, wrk.body = "POST", file:read("*a")
  file:close()
  wrk.headers["Content-Type"] = words[2]
  wrk.headers["Authorization"] = "Bearer " .. words[3]
  labels, values = {}, {}
  for i = 4, #words, 2 do
    labels[#labels + 1] = words[i]
    values[#values + 1] = tonumber(words[i + 1])
  end
  good, wrong, first = 0, 0, ""
  message = wrk.format()
end

function request()
  return message
end

function response(status, headers, body)
  local count = 0
  if status == 200 then
    for label, value in body:gmatch('{%s*"([^"]+)":%s*([%d.e-]+)') do
      if label ~= labels[count + 1] or math.abs(tonumber(value) - values[count + 1]) > 1e-3 then break end
      count = count + 1
    end
  end
  if count == #labels then
    good = good + 1
  else
    wrong = wrong + 1
    first = first ~= "" and first or status .. " " .. body:sub(1, 200)
  end
end

function done(summary, latency)
  local right, bad, errors = 0, 0, summary.errors
  local said = ""
  for _, thread in ipairs(threads) do
    right, bad = right + thread:get("good"), bad + thread:get("wrong")
    if thread:get("first") ~= "" then said = thread:get("first") end
  end
  io.write(string.format("RESULT %d %d %d %f %f %f %s\n", right, bad,
    errors.connect + errors.read + errors.write + errors.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, said:gsub("%s+", " ")))
end
